"""ACE and the losses of rlvr_ops at the extension points of trainers. Importing one needs no framework."""
