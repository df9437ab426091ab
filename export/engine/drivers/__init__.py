"""Scripts that run inside an engine's environment: they import it and the standard library only."""
