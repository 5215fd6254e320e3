"""How a function runs on N workers: runtime, Ray, checkpoints, metrics, recipes."""
