"""How tokens attend: backends behind one interface, their capabilities, and the choice between them."""
