"""The transformer: parameters are a table of specs, the model is a handful of functions."""
