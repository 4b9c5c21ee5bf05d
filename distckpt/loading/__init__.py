"""manifest -> plan -> verified reads -> place. Every load is a reshard. Read in that order: open, plan, read, load."""
