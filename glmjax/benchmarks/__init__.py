"""What `glmjax bench` runs: each module measures one thing and returns its numbers."""
