"""Experiments whose plan was written before their runs, with their results and what makes tables and plots of them."""
