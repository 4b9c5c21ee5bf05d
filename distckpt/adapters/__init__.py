"""Live objects of one backend <-> State, one file each. The only place that imports a backend."""
