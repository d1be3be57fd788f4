DROP TABLE replica
