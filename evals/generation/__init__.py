"""Replies: drawn with shared noise, from transformers or vLLM, and kept on disk."""
