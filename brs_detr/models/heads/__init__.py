"""Dense and second-stage heads: region proposals, ATSS, RoI."""
