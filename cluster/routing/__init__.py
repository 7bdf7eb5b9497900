"""Which workers serve a request: the gateway's books, and the choice made from them."""
