import org.apache.spark.sql.Dataset;
import org.apache.spark.sql.Row;
import org.apache.spark.sql.SparkSession;

/**
 * Writes and reads TFRecord files with a connector of Spark for them.
 *
 * Arguments: the connector's format; then for each step four. "write", the recordType, a query, and where its rows go.
 * Or "read", the recordType, what to read, and where its rows go as JSON; prints their schema.
 */
public class Connector {
    public static void main(String[] arguments) {
        SparkSession spark = SparkSession.builder().master("local[1]").appName("connector")
            .config("spark.ui.enabled", "false").config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1").getOrCreate();
        String format = arguments[0];
        for (int index = 1; index < arguments.length; index += 4) {
            String recordType = arguments[index + 1], from = arguments[index + 2], to = arguments[index + 3];
            if (arguments[index].equals("write")) {
                spark.sql(from).repartition(1).write().format(format).option("recordType", recordType).save(to);
            } else {
                Dataset<Row> found = spark.read().format(format).option("recordType", recordType).load(from);
                System.out.println("SCHEMA " + found.schema().json());
                found.write().json(to);
            }
        }
        spark.stop();
    }
}
