"""What travels: the layout of a model's weights in one buffer, and the rules that combine them."""
