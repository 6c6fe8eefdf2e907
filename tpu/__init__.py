"""What only a TPU pod needs: launch files, an image, the walk-through. glmjax does not import it."""
