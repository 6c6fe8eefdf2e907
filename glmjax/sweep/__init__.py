"""Many small trainings that answer one question: what they are, running them, what came out."""
