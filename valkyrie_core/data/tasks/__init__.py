"""Problems that are made from a seed: as many as are asked for, none of them stored."""
