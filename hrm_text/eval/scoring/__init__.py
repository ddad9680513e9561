"""Scorers: from a response and its question to what the response is worth."""
