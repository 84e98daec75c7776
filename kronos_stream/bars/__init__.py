"""Bar assembly: ordered, gap-free bars per series, and the context windows made of them."""
