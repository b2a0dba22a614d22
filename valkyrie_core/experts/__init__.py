"""How a trained model uses its experts: loads, what they choose, and what removing one costs."""
