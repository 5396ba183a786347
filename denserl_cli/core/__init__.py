"""The method: maths, models, data, and the stages that combine them."""
