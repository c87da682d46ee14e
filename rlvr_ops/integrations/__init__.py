"""Adapters for other trainers. Each imports its framework, and nothing here is imported by `import rlvr_ops`."""
