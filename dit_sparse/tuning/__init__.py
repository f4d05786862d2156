"""Auto-tuning to a quality target: oracle, cost table, allocation, closed loop, presets."""
