"""The flags that say what becomes integers, for all commands that open a model."""

from dataclasses import dataclass, replace
from typing import Literal

from glmjax.config import Kernel, Quantization


@dataclass(frozen=True)
class QuantizeFlags:
    quantize: Literal["int8", "int4", "float"] | None = None
    """Make integers of the kernels in the blocks, unless told otherwise by the official rule; float:
    make floats of those that are integers."""
    scheme: Literal["absmax", "zeropoint"] = "absmax"
    """absmax: integers centred on 0, as the official code has them. zeropoint: on the middle of the
    weights, by equations 9 to 11 of GLM-130B."""
    group_size: int | None = None
    """So many inputs share a scale, such as 128; without it all of a row do."""
    kernels: tuple[Kernel, ...] = Quantization.kernels
    """Which kernels become integers."""
    quantize_embeddings: bool = False
    """Make integers of the word embedding and the output layer too."""
    float_layers: tuple[int, ...] = ()
    """Blocks, from 0, that stay floats."""

    def quantization(self) -> Quantization | Literal["float"] | None:
        """What `glmjax.load` and `convert` take.

        Raises:
            ValueError: the flags contradict each other.
        """
        if self.quantize in ("int8", "int4"):
            return Quantization(
                bits=4 if self.quantize == "int4" else 8,
                scheme=self.scheme,
                group_size=self.group_size,
                kernels=self.kernels,
                embeddings=self.quantize_embeddings,
                float_layers=self.float_layers,
            )
        if self != replace(QuantizeFlags(), quantize=self.quantize):
            raise ValueError(
                "--scheme, --group-size, --kernels, --quantize-embeddings and --float-layers say how "
                "to quantise: add --quantize int8 or --quantize int4"
            )
        return "float" if self.quantize == "float" else None
