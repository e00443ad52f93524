"""Where a foreign model is touched: one file per host, and what they share."""
