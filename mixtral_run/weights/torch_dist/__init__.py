"""The torch_dist format: items, `.metadata`, the files next to them."""
