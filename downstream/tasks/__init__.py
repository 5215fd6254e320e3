"""The tasks; each builds its network on f3, its loss and its metric."""
