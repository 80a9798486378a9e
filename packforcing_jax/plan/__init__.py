"""What an experiment costs: closed formulas, counted programs, what fits a device, measured times."""
