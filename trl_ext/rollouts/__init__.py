"""What a rollout asks: pass rates and weighted draws of prompts, ladders of hints, and groups made again."""
