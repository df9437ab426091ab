"""The reference speculative decoder: small, exact, readable; what training measures itself with."""
