"""rlvr_ops inside the trainers that people run: one module for each framework, imported by name."""
