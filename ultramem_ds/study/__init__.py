"""Studies: a file of rows, seeds and token budgets becomes runs, a table and figures."""
