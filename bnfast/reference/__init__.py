"""The formulas in plain torch: the tests' oracle, and the way to higher derivatives."""
