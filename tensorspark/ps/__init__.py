"""The parameter server: frames, decisions, the Tornado shell around them, and the workers' client."""
