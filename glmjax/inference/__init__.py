"""Generation with a KV cache: sampling, continuing prompts and filling their blanks."""
