"""From graded replies to the findings of a report."""
