"""Questions and answers as JSON Lines, and how those of others become so."""
