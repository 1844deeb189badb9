"""The inspector: a page that shows which visual tokens a method keeps, and what the model reads from them."""
