"""Mixture of experts: routers, gates, balance, experts, and the channel mixer made of them."""
