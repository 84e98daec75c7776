"""From sample paths to statements: quantiles, summaries, tables, plots and files."""
