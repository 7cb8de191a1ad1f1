"""A real Apache Hadoop HDFS for the tests."""
