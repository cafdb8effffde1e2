"""Is a run as it should be: checks, each a pure function of numbers to a finding, and what gathers the numbers."""
