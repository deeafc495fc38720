"""Which answers are made up: by rule, or by a judge model."""
