"""ACE, our surrogates and our head inside verl 0.9.1 (docs/verl.md). verl itself imports `plugin`, by its entry point."""
