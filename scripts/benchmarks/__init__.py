"""What the house is fast at, measured beside a named peer and a limit of the machine, in one run."""
