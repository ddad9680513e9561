"""The model: an architecture is a plan of module calls, and one small loop obeys any plan."""
