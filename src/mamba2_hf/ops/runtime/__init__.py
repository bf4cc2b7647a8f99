"""How ops are launched, and what they may ask of their surroundings and of the chip."""
