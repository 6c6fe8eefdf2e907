"""Pictures show what they were given."""

from xml.etree import ElementTree

import numpy as np
from PIL import Image

from glmjax.training.plot import plot_curves, plot_losses, svg

STEPS = np.arange(10, 60, 10)
PANELS = {
    "heldout_loss": {"b": (STEPS[:1], np.array([3.0]))},
    "loss": {
        "_a $x$ <&>": (STEPS, 9.0 - STEPS / 10),
        "b": (STEPS, 8.0 - STEPS / 20),
        **{f"run {i}": (STEPS, STEPS / (i + 10)) for i in range(10)},
    },
}


def test_losses_are_a_picture(tmp_path):
    rows = [{"step": 10, "loss": 5.0}, {"step": 10, "heldout_loss": 5.1}, {"step": 20, "loss": 4.0}]
    plot_losses(rows, {"unigram": 4.5, "uniform": 6.0}, tmp_path / "loss.png", changes=(10,))
    assert Image.open(tmp_path / "loss.png").size == (960, 600)


def test_each_metric_has_a_panel_and_each_run_a_curve():
    heldout, loss = plot_curves(PANELS, "step").axes
    assert (heldout.get_ylabel(), loss.get_ylabel()) == ("heldout_loss", "loss")
    assert {axes.get_xlabel() for axes in (heldout, loss)} == {"step"}
    for axes, curves in ((heldout, PANELS["heldout_loss"]), (loss, PANELS["loss"])):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
        for line, (xs, values) in zip(axes.get_lines(), curves.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), xs)
            np.testing.assert_array_equal(line.get_ydata(), values)


def test_a_run_looks_the_same_in_every_panel_and_like_no_other():
    heldout, loss = plot_curves(PANELS, "step").axes
    looks = [(line.get_color(), line.get_linestyle()) for line in loss.get_lines()]
    assert len(set(looks)) == 12
    names = list(PANELS["loss"])
    (line,) = heldout.get_lines()
    assert (line.get_color(), line.get_linestyle()) == looks[names.index("b")]


def test_an_element_for_a_page_has_names_as_text_and_the_colour_of_the_page():
    text = svg(PANELS, "model FLOPs")
    element = ElementTree.fromstring(text)
    assert element.tag.endswith("svg")
    words = {each.text for each in element.iter() if each.tag.endswith("text")}
    assert {"_a $x$ <&>", "b", "loss", "heldout_loss", "model FLOPs"} <= words
    assert "currentColor" in text and "#000000" not in text and "#010203" not in text
    assert "<script" not in text and "<image" not in text and "@import" not in text
    assert svg(PANELS, "model FLOPs") == text
