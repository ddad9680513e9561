"""Evaluation: questions with known answers, put to anything that speaks the Engine protocol."""
