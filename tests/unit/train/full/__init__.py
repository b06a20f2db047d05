"""Unit tests of full fine-tuning."""
