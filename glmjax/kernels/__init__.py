"""Operations on arrays; one folder each, `reference.py` is the meaning."""
