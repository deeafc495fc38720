"""Ways to fit one linear map over heads."""
