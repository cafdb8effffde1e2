"""Search at test time: candidates of tokens, a verifier that judges their images, and what is kept of them."""
