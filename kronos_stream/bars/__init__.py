"""Bar assembly: ordered, gap-free bars per series, and the rolling contexts made of them."""
