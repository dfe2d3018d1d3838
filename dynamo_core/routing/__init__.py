"""Which worker serves a request, and why: facts, filters, scorers, pickers, stacks, decision records."""
